"""Prints, as constraints for pip, the versions of what a base image brings and a build must not replace.

Run: ``python3 brought.py "torch transformer_engine apex"``. The names are those that Python imports; one that the base
does not have ends the build with a sentence. Packages compiled against the base's torch are constrained as well.
"""

import importlib.metadata
import importlib.util
import sys

BOUND_TO_TORCH = ("flash-attn", "numpy", "pytorch-triton", "torchvision", "transformer-engine", "triton")
"""Distributions, of which every base has some."""


def main(required: str) -> None:
    for name in required.split():
        if importlib.util.find_spec(name) is None:
            sys.exit(
                f"BASE_IMAGE has no {name}, which BASE_BRINGS names: choose a base that has it, or leave the name out."
            )
    for name in ("torch", *BOUND_TO_TORCH):
        try:
            print(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    main(sys.argv[1])
