"""Which parameters a layout cuts or sets apart, by name: for whoever writes a layout's checkpoint without a model."""

import re
from typing import Any

from moe_train.config.load import parse_recipe
from moe_train.errors import ConfigError, MoeTrainError
from moe_train.model.family import load_model_config
from moe_train.model.profiles import TensorRule, profile_of
from moe_train.model.tensor import check_tensor
from moe_train.parallel.tensor_slice import TensorSlice


def dense_parts(
    rules: tuple[TensorRule, ...], name: str, shape: tuple[int, ...], tensor: int
) -> list[TensorSlice] | None:
    """Parts of a parameter outside of MoE blocks, by rank of a tensor group; None: every rank holds it whole."""
    module, _, leaf = name.rpartition(".")
    actions = next((r.actions for r in rules if re.fullmatch(rf"(.*\.)?{r.pattern}", module)), ())
    columns = "columns" in actions
    if not columns and not ("rows" in actions and leaf == "weight"):
        return None
    make, size = (TensorSlice.rows, shape[0]) if columns else (TensorSlice.columns, shape[-1])
    width = size // tensor
    return [make(shape, rank * width, (rank + 1) * width) for rank in range(tensor)]


class FamilyCuts:
    """Args:
    model_type: of the family. recipe: as a checkpoint holds it; read for dense tensor parallelism alone.
    """

    def __init__(self, model_type: str, recipe: dict[str, Any]):
        self.names = profile_of(model_type).names
        self._recipe = recipe
        self._plan: tuple[TensorRule, ...] | None = None

    def shared(self, name: str, gate: bool) -> bool:
        """Whether a parameter of an MoE block (by its name there) is of the shared experts, their gate included."""
        attribute = name.partition(".")[0]
        return attribute == self.names.shared_experts or (gate and attribute == self.names.shared_experts_gate)

    def dense(self, name: str, shape: tuple[int, ...], tensor: int) -> list[TensorSlice] | None:
        """Parts of a parameter outside of MoE blocks, as `model.tensor` cuts it; None: every rank holds it whole."""
        if tensor == 1:
            return None
        if self._plan is None:
            self._plan = self._rules(tensor)
        return dense_parts(self._plan, name, shape, tensor)

    def _rules(self, tensor: int) -> tuple[TensorRule, ...]:
        try:
            config = load_model_config(parse_recipe(self._recipe))
        except MoeTrainError as error:
            raise ConfigError(
                f"--tensor {tensor} needs the model that the checkpoint's recipe names, and it cannot be read here "
                f"({error}): reshard with --tensor 1; a run at any parallel.tensor loads that too"
            ) from None
        check_tensor(config, tensor)
        return profile_of(config.model_type).tensor(config)
