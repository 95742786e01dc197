"""The layout certificate: a recipe's numbers, proved to be the same at every layout."""

from moe_train.verify.certificate import Certificate, LayoutResult, certify, check_layout
from moe_train.verify.grid import Layout, full_grid, quick_grid
from moe_train.verify.place import Place, parse_precisions, parse_worlds, place_for
from moe_train.verify.shrink import shrink
from moe_train.verify.truth import Case, prepare_case

__all__ = [
    "Case",
    "Certificate",
    "Layout",
    "LayoutResult",
    "Place",
    "certify",
    "check_layout",
    "full_grid",
    "parse_precisions",
    "parse_worlds",
    "place_for",
    "prepare_case",
    "quick_grid",
    "shrink",
]
