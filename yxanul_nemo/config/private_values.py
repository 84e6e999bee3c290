"""Passwords and keys have no place in a configuration: it goes into files, checkpoints, trackers and a run's page, for others to read."""

import re

SECRET_WORDS = frozenset(
    {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"}
)
"""A variable with one of these words in its name holds a secret, as WANDB_API_KEY and HF_TOKEN do; TOKENIZERS_PARALLELISM does not."""
OF_A_PLACE = ("_FILE", "_PATH", "_DIR")
"""Ends of the names of variables that say where something lies."""
_ASSIGNMENT = re.compile(r"""([A-Za-z_][A-Za-z0-9_]*)=["']?(?=[^\s"'$`,])""")
_URL_WITH_PASSWORD = re.compile(r"://[^/\s:@$]*:[^/\s@$]+@")
INSTEAD = (
    "expected none: set the variable in the shell (`export {name}=...`) before the command; jobs of Slurm start with its environment. "
    "A file that only you can read serves too: cluster.setup='[source ~/.secrets]'"
)


def require_no_secret(name: str, value: str) -> None:
    """Refuse a variable that holds a secret; the ValueError does not repeat its value."""
    upper = name.rpartition(".")[2].upper()
    if SECRET_WORDS.intersection(upper.split("_")) and not upper.endswith(OF_A_PLACE):
        raise ValueError(
            f"{name} would lie in files that others can read; {INSTEAD.format(name=name.rpartition('.')[2])}"
        )
    require_no_password_in_url(name, value)


def require_no_secrets_in(key: str, line: str) -> None:
    """Refuse a line of shell or an option that sets such a variable to something else than what the shell looks up."""
    for match in _ASSIGNMENT.finditer(line):
        require_no_secret(match[1], "")
    require_no_password_in_url(key, line)


def require_no_password_in_url(key: str, value: str) -> None:
    """Refuse `https://name:password@host`; the ValueError does not repeat it."""
    if _URL_WITH_PASSWORD.search(value):
        raise ValueError(
            f"{key} has an address with a password, which would lie in files that others can read; expected an address alone"
        )
