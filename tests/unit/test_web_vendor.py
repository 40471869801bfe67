"""The libraries in the page are the ones their registry has, all of them are named, and their licences come along."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import headwater

WEB = Path(headwater.__file__).parent / "web"
VENDOR = WEB / "vendor"
PACKAGES: list[dict[str, Any]] = json.loads((VENDOR / "manifest.json").read_text())["packages"]
FILES = {file["path"]: file for package in PACKAGES for file in package["files"]}


@pytest.mark.parametrize("path", FILES)
def test_a_vendored_file_is_unchanged(path: str) -> None:
    assert hashlib.sha256((VENDOR / path).read_bytes()).hexdigest() == FILES[path]["sha256"]


def test_every_vendored_file_is_in_the_manifest() -> None:
    present = {str(path.relative_to(VENDOR)) for path in VENDOR.rglob("*") if path.is_file()}
    assert present - {"manifest.json", "README.md"} == set(FILES)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package["name"])
def test_a_package_has_a_version_a_source_and_its_licence(package: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])
    assert package["version"] in package["registry"]
    assert all(file["source"] for file in package["files"])
    licences = [file["path"] for file in package["files"] if file["path"].startswith("licences/")]
    assert package["licence"]
    assert any(len((VENDOR / path).read_text()) > 200 for path in licences)


def test_a_file_that_names_its_version_names_the_one_of_the_manifest() -> None:
    versions = {package["name"]: package["version"] for package in PACKAGES}
    assert f"markdown-it {versions['markdown-it']}" in (VENDOR / "markdown-it.js").read_text()
    assert f"DOMPurify {versions['dompurify']}" in (VENDOR / "dompurify.js").read_text()
    assert f"Highlight.js v{versions['@highlightjs/cdn-assets']}" in (VENDOR / "highlight/core.js").read_text()


def test_the_import_map_names_every_library_and_nothing_else() -> None:
    found = re.search(r'<script type="importmap">(.*?)</script>', (WEB / "index.html").read_text(), re.DOTALL)
    assert found
    imports: dict[str, str] = json.loads(found[1])["imports"]
    # The API's documentation is a page of its own, which loads its library as a plain script.
    scripts = {path for path in FILES if path.endswith(".js") and not path.startswith("swagger-ui/")}
    assert {target.removeprefix("/static/vendor/") for target in imports.values()} == scripts
    bare = {
        name
        for path in [WEB / "app.js", *(WEB / "elements").glob("*.js"), *(WEB / "models").glob("*.js")]
        for name in re.findall(r'(?:from |import\()"([^"./][^"]*)"', path.read_text())
    }
    assert bare <= set(imports)
    assert not any(re.search(r'from "[^.]', path.read_text()) for path in (WEB / "client").glob("*.js")), (
        "the client stands alone"
    )


def test_what_the_page_names_exists() -> None:
    for page in ("index.html", "sign-in.html"):
        for name in re.findall(r'(?:src|href)="/static/([^"]+)"', (WEB / page).read_text()):
            assert (WEB / name).is_file(), name


def test_the_page_runs_no_inline_script_but_its_import_map() -> None:
    for page in WEB.glob("*.html"):
        text = page.read_text()
        assert not re.search(r"\son\w+=|javascript:|\sstyle=|<style", text), page.name
        inline = [tag for tag in re.findall(r"<script[^>]*>", text) if "src=" not in tag]
        assert inline in ([], ['<script type="importmap">']), page.name
