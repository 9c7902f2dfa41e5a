"""The `shotloom` command."""


def main() -> None:
    raise SystemExit("shotloom: the command line is being built")
