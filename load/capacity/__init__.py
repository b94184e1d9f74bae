"""How many nodes of each kind a fleet needs, and what a device costs a year.

Lives here: the constants and where each was measured (`constants.toml`, `constants`), machines and
prices with their sources (`prices.toml`, `prices`), the model (`plan`, `model`), the price of a
managed shadow service beside it (`managed`), what people read (`report`), the command (`command`),
figures taken from other rigs' runs (`measured`), and one measurement of our own: bytes of a leaf on
Cassandra's disk (`storage`). The table of reconnect storms is here, too (`storms`); their
simulation is not (`load.storm`).

Rules: the model is pure, and knows no figure that is not in one of the two files. A constant that
nobody measured yet has no value: what needs it has no result, says so, and stops the total. A price
without a source is not a price.
"""
