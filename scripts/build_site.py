"""The documentation as a site: README, docs/, results and a reference from the docstrings, with links checked.

    pip install -e ".[docs]"
    python scripts/build_site.py --out site          # a link that leads nowhere is an error
    python scripts/build_site.py --serve             # http://127.0.0.1:8000

The pages stay where they are and are copied in the same layout, so that one set of links holds on the site, on a forge
and on disk. Half a minute.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "docs",
    "model_cards",
    "scripts/results",
)
TUTORIALS = (
    "image_classifier", "text_classifier", "language_model", "clip", "your_own_model", "editing", "forget", "fix",
    "lift", "match", "steer", "typographic", "tutorials",
)  # fmt: skip
HOW_TO = ("looking", "sharing", "explorer", "command_line", "tasks", "components", "extending")
EXPLANATION = ("how_it_works", "comparison", "results")
REFERENCE = {
    "hf_coar": "The pieces in order", "hf_coar.attributions.attributions": "Attributions",
    "hf_coar.attributions.looking": "Parts and tables of attributions", "hf_coar.components": "Components",
    "hf_coar.components.groups": "What a component is", "hf_coar.components.names": "Names",
    "hf_coar.models.outputs": "Outputs", "hf_coar.models.tasks": "Tasks", "hf_coar.data": "Data",
    "hf_coar.masking.masked_model": "Ablating", "hf_coar.estimators.path_gradient": "Path gradient",
    "hf_coar.estimators.regression": "Regression", "hf_coar.estimators.solvers": "Solvers",
    "hf_coar.estimators.baselines": "Baselines", "hf_coar.judging.evaluation": "Evaluation",
    "hf_coar.judging.stability": "Stability", "hf_coar.editing": "Edits", "hf_coar.editing.edited": "Edited models",
    "hf_coar.runs.running": "What changes speed only", "hf_coar.plots": "Pictures", "hf_coar.explore": "Explorer",
    "hf_coar.errors": "Errors",
}  # fmt: skip


def stage(folder: Path) -> None:
    """All pages in the layout of the repository, and a page of reference a module."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for page in folder.rglob("*.md"):
        # Which snippets run is for the tests; the site knows languages alone.
        page.write_text(re.sub(r"^```(\w+) not-run$", r"```\1", page.read_text("utf-8"), flags=re.M), "utf-8")
    (folder / "reference").mkdir()
    for module, title in REFERENCE.items():
        (folder / "reference" / f"{module}.md").write_text(f"# {title}\n\n::: {module}\n", "utf-8")


def settings(pages: Path, out: Path) -> dict[str, Any]:
    """What mkdocs is told."""

    def entries(names: tuple[str, ...]) -> list[str]:
        return [f"docs/{name}.md" for name in names if (ROOT / "docs" / f"{name}.md").is_file()]

    python = {
        "paths": [str(ROOT)],
        "options": {
            "docstring_style": "google", "show_source": False, "show_root_heading": True, "members_order": "source",
            "show_if_no_docstring": False, "filters": ["!^_"], "separate_signature": True, "heading_level": 2,
            "show_symbol_type_heading": True, "inherited_members": True,
            "docstring_options": {"warn_unknown_params": False, "warnings": False},
        },
    }  # fmt: skip
    placed = {*TUTORIALS, *HOW_TO, *EXPLANATION}
    others = tuple(sorted(page.stem for page in (ROOT / "docs").glob("*.md") if page.stem not in placed))
    results = sorted(path.relative_to(pages).as_posix() for path in (pages / "scripts" / "results").rglob("*.md"))
    return {
        "site_name": "hf_coar",
        "docs_dir": str(pages),
        "site_dir": str(out.resolve()),
        "use_directory_urls": False,
        "theme": {
            "name": "material", "font": False, "features": ["content.code.copy", "navigation.sections", "toc.follow"],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default", "primary": "indigo"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate", "primary": "indigo"},
            ],
        },
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": python}}}],
        "markdown_extensions": [
            "tables", "admonition", "pymdownx.superfences", "pymdownx.highlight",
            {"toc": {"permalink": True, "slugify": "{slugify}"}}, {"pymdownx.arithmatex": {"generic": True}},
        ],
        "validation": {
            "omitted_files": "ignore", "absolute_links": "warn", "unrecognized_links": "warn", "anchors": "warn",
        },
        "nav": [
            {"Home": "README.md"},
            {"Tutorials": entries(TUTORIALS)},
            {"How to": [*entries(HOW_TO + others), "CONTRIBUTING.md"]},
            {"Explanation": entries(EXPLANATION)},
            {"Reference": [{title: f"reference/{module}.md"} for module, title in REFERENCE.items()]},
            {"Results": results},
            {"Changes": "CHANGELOG.md"},
        ],
    }  # fmt: skip


def main() -> None:
    """Stage and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="(default %(default)s)")
    parser.add_argument("--serve", action="store_true", help="serve it instead")
    args = parser.parse_args()
    import yaml

    with tempfile.TemporaryDirectory() as temporary:
        pages, config = Path(temporary) / "pages", Path(temporary) / "mkdocs.yml"
        stage(pages)
        text = yaml.safe_dump(settings(pages, args.out), sort_keys=False, allow_unicode=True)
        # Anchors as forges make them, so that the links of the pages hold on both.
        text = text.replace("'{slugify}'", "!!python/object/apply:pymdownx.slugs.slugify {kwds: {case: lower}}")
        config.write_text(text, "utf-8")
        command = ["serve"] if args.serve else ["build", "--strict", "--quiet"]
        sys.exit(subprocess.run([sys.executable, "-m", "mkdocs", *command, "--config-file", str(config)]).returncode)


if __name__ == "__main__":
    main()
