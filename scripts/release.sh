#!/usr/bin/env bash
# Everything that a release needs but the upload: versions agree, the wheel and the source archive are built and checked,
# the wheel installs by itself and its command runs. What is left to do is printed.
#   bash scripts/release.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check build twine
version=$("$venv/bin/python" -c 'import hf_coar; print(hf_coar.__version__)')
grep -qx "version: $version" CITATION.cff || {
  echo "CITATION.cff does not say version $version, as hf_coar/__init__.py does." >&2
  exit 1
}
grep -q "^## \[$version\]" CHANGELOG.md || {
  echo "CHANGELOG.md has no section [$version]; rename [Unreleased] to it." >&2
  exit 1
}
[ -z "$(git status --porcelain)" ] || {
  echo "There are changes that are not committed." >&2
  exit 1
}
rm -rf dist
"$venv/bin/python" -m build --outdir dist
"$venv/bin/python" -m twine check --strict dist/*
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
# Without what it needs, which is there already: whether the wheel is whole.
"$venv/bin/python" -m pip install --quiet --no-deps --target "$fresh" dist/*.whl
(cd "$fresh" && PYTHONPATH="$fresh" "$OLDPWD/$venv/bin/python" -P -m hf_coar --version)
echo "dist/ holds version $version. To publish: git tag v$version && git push --tags && twine upload dist/*"
