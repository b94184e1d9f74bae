"""What a shadow is: topics, documents, updates, merging and reading. Pure.

Rules: no I/O, no clock, no driver, no settings object; time comes in as an argument. Everything
here can be driven through every order in memory. Must not come in: imports from `mqtt`, `store`,
`pipeline` or anything above.
"""
