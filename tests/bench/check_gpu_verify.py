"""`moe-train verify --device cuda` on a real GPU: certificates, how near each backend comes to its bounds, plants.

    python tests/bench/check_gpu_verify.py recipes/quickstart.yaml recipes/deepseek_v3_mini.yaml

Exit code 1 if a layout differs, or if a planted error does not. Layouts are of one rank, or of those that --world
names: more ranks than GPUs share them, which shows the kernels at every division of ranks, and nothing of NCCL.
`--toy` shows on a CPU that this file runs.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "verify"))

import planted
from rich.console import Console
from small_configs import FAMILIES, small_recipe

from moe_train.config import load_recipe
from moe_train.verify import Certificate, check_layout, parse_worlds, place_for, prepare_case, shrink
from moe_train.verify.certificate import certify_shrunk, table
from moe_train.verify.rounding import plain_layouts

PLANTED = (
    (None, "fused"),
    (None, "grouped"),
    ("experts not clipped", "fused"),
    ("rows of two experts swapped", "fused"),
    ("one row of a micro-batch lost", "fused"),
    ("bias left out of the choice", "fused"),
    ("shared expert counted twice", "fused"),
    ("learning rate does not reach the experts", "fused"),
    ("experts left out of the norm", "fused"),
    ("first expert tensor frozen: in no optimizer", "grouped"),
    ("gate detached from the output", "grouped"),
)
"""What is planted (nothing, to begin with), and the backend that has it, in bf16."""
QUANTILE = {"aux_loss_coef": 0.02, "bias_update_rate": 0.7, "bias_update": "quantile", "aux_loss": "global_batch"}
"""Its bias is large after one step."""


def nearness(certificate: Certificate) -> list[str]:
    """Worst error of each quantity in units of its bound, by precision and backend."""
    worst: dict[tuple[str, str, str], tuple] = {}
    for result in certificate.results:
        for quantity, found in result.comparison.worst.items():
            key = (result.layout.precision, result.layout.backend, quantity)
            if key not in worst or found.badness > worst[key][0]:
                worst[key] = (found.badness, found, result.layout)
    return [
        f"{precision} {backend:8}{quantity:16}{badness:7.2f} of {found.bound:.1e}  {found.parameter} [{layout}]"
        for (precision, backend, quantity), (badness, found, layout) in sorted(worst.items(), key=lambda item: item[0])
        if found.error
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--world", default="1", help="numbers of ranks, separated by commas")
    parser.add_argument("--certificates-only", action="store_true", help="plant nothing")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    device, console, good = "cpu" if arguments.toy else "cuda", Console(width=150), True
    place = place_for(device, parse_worlds(arguments.world), ("fp32", "bf16"))
    for path in arguments.recipes:
        recipe = shrink(load_recipe(path, ()), place.worlds)
        certificate = certify_shrunk(str(path), recipe, place, console=console)
        console.print(table(certificate))
        print("\n".join(nearness(certificate)))
        good &= certificate.passed
    model = {"config": FAMILIES["deepseek_v3"] | {"n_group": 1, "topk_group": 1}}
    family = small_recipe("deepseek_v3", moe=QUANTILE, model=model)
    case = prepare_case(shrink(family, (1,)))
    whole = plain_layouts(case)[0]
    plants = () if arguments.certificates_only else (PLANTED[1], PLANTED[-1]) if arguments.toy else PLANTED
    for name, backend in plants:
        plant = planted.ERRORS[name] if name else None
        found = check_layout(case, replace(whole, backend=backend), plant, place.device)
        right = found.passed == (name is None)
        print(f"{name or 'nothing planted'} [{backend}]: {found.verdict}{'' if right else '  <- WRONG'}")
        good &= right
    print("all ok" if good else "NOT ok")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
