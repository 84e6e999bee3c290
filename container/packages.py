"""What an image provides and what it lacks, for container/Dockerfile; needs nothing but Python 3.11 or later and pyproject.toml.

python container/packages.py provided      versions of what must stay as the image has it, as constraints for pip
python container/packages.py missing       the project's requirements without these
python container/packages.py check FILE    whether all of FILE is still installed in the same version
"""

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
BUILT_FOR_THE_IMAGE = re.compile(
    r"torch|torchvision|torchaudio|torchao|torch-tensorrt|triton|pytorch-triton|transformer-engine.*|flash-attn.*|apex|nvidia-.*|"
    r"cuda-.*|cupy.*|tensorrt.*"
)
"""Names of packages that belong to the image's torch and CUDA."""


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def provided() -> dict[str, str]:
    """Name -> version of what is installed here and must stay."""
    found = {normal(each.metadata["Name"]): each.version for each in distributions() if each.metadata["Name"]}
    return {name: version for name, version in sorted(found.items()) if BUILT_FOR_THE_IMAGE.fullmatch(name)}


def missing(project_file: Path = PROJECT_FILE) -> list[str]:
    """The project's requirements that do not belong to the image's torch and CUDA."""
    requirements = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [
        each for each in requirements if not BUILT_FOR_THE_IMAGE.fullmatch(normal(re.split(r"[\[<>=!~; ]", each)[0]))
    ]


def changed(constraints: list[str]) -> list[str]:
    """Constraints `name==version` that the packages installed now do not fulfil."""
    now = {f"{name}=={version}" for name, version in provided().items()}
    return [line for line in constraints if line.strip() and line.strip() not in now]


def main(arguments: list[str]) -> int:
    """Exit code: 1 if `check` finds a change."""
    match arguments:
        case ["provided"]:
            print("\n".join(f"{name}=={version}" for name, version in provided().items()))
        case ["missing"]:
            print("\n".join(missing()))
        case ["check", path]:
            broken = changed(Path(path).read_text(encoding="utf-8").splitlines())
            if broken:
                print(f"replaced by pip: {', '.join(broken)}", file=sys.stderr)
                return 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
