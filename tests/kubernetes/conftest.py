"""The schemas that a cluster would check manifests with."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.ranks import REPOSITORY


@pytest.fixture(scope="session")
def definitions() -> dict[tuple[str, str], dict[str, Any]]:
    """By ``apiVersion`` and ``kind``: the schema in a CustomResourceDefinition; the test skips without their folder."""
    folder = Path(os.environ.get("HFT_TEST_CRDS", REPOSITORY.parent / "shared" / "k8s"))
    if not folder.is_dir():
        pytest.skip(f"no resource definitions: {folder} is not a folder; set HFT_TEST_CRDS")
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            name = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schemas[name] = version["schema"]["openAPIV3Schema"]
    return schemas
