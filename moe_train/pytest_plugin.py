"""The certificate as a pytest fixture, for people who change the layer and want to know.

    def test_my_layer(certify_recipe):
        certify_recipe("recipes/quickstart.yaml", modified=my_package.with_my_backend)

`modified` is an importable function that returns a context manager: it runs in every worker process and puts the
change into the package, for example an own entry of `moe_train.moe.experts.BACKENDS`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def certify_recipe() -> Callable:
    """(recipe, overrides=(), worlds=(1, 2, 3, 4), full=False, modified=None, device="cpu", precisions=None)
    -> `Certificate`.

    device: cpu or cuda, as for `moe-train verify`; worlds of more ranks than GPUs share them, and talk over gloo.
    precisions: some of fp64, fp32 and bf16; None: all that the device has.
    Fails the test with the first differing quantity of every layout that is not equal to one process.
    """

    def certify(
        path: str | Path,
        *,
        overrides: Sequence[str] = (),
        worlds: Sequence[int] = (1, 2, 3, 4),
        full: bool = False,
        modified: Callable | None = None,
        device: str = "cpu",
        precisions: Sequence[str] | None = None,
    ):
        # imported here: every pytest run on this machine loads the plugin, few use it
        from moe_train.config import load_recipe
        from moe_train.verify import parse_precisions, place_for, shrink
        from moe_train.verify.certificate import certify_shrunk

        place = place_for(device, worlds, parse_precisions(",".join(precisions)) if precisions else None)
        recipe = shrink(load_recipe(Path(path), overrides), place.worlds)
        certificate = certify_shrunk(str(path), recipe, place, full=full, modified=modified)
        failed = [f"{result.layout}: {result.verdict}" for result in certificate.results if not result.passed]
        if failed:
            pytest.fail(
                "\n".join([f"{len(failed)} of {len(certificate.results)} layouts differ", *failed]), pytrace=False
            )
        return certificate

    return certify
