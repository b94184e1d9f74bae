"""`python -m shadowsvc` is `shadowsvc`."""

from shadowsvc.cli import main

if __name__ == "__main__":
    main()
