"""`python -m load`: the commands of the rig; `scripts/load` sets up what they need."""

from load.command import main

if __name__ == "__main__":
    raise SystemExit(main())
