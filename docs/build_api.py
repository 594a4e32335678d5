"""Write the API pages from the docstrings, with pdoc.

    python docs/build_api.py --out build/docs        (what `make docs` runs)

Open build/docs/index.html. Every module of the package is documented, the public names under `ksub_ds` first.
"""

import argparse
import importlib
import pkgutil
import shutil
import sys
import warnings
from pathlib import Path


def documented_modules() -> list[str]:
    """List all modules of the package except those that are only run (`__main__`)."""
    import ksub_ds

    found = pkgutil.walk_packages(ksub_ds.__path__, "ksub_ds.")
    return ["ksub_ds", *sorted(module.name for module in found if not module.name.endswith("__main__"))]


def resolve_public_names() -> None:
    """Import the names of `ksub_ds` now: they are imported when first used, and pdoc only sees what is there."""
    import ksub_ds

    for name in ksub_ds.__all__:
        setattr(ksub_ds, name, getattr(ksub_ds, name))


def build(out: Path, names: list[str]) -> None:
    """Write the pages of some modules into `out`, which is emptied first."""
    import pdoc

    resolve_public_names()
    for name in names:
        importlib.import_module(name)  # fail here, with its name, if a module cannot be imported
    pdoc.render.configure(docformat="google", show_source=False, footer_text="ksub_ds")
    shutil.rmtree(out, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The module specification")  # a package brings its modules along
        warnings.filterwarnings("ignore", "Error parsing type annotation Literal")  # transformers' own configurations
        pdoc.pdoc(*names, output_directory=out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the API pages.")
    parser.add_argument("--out", type=Path, default=Path("build/docs"), help="folder, emptied first")
    options = parser.parse_args()
    try:
        names = documented_modules()
        build(options.out, names)
    except ImportError as error:
        sys.exit(f"error: {error}; pip install -e '.[docs]' brings what is needed")
    print(f"{options.out / 'index.html'}: {len(names)} modules")


if __name__ == "__main__":
    main()
