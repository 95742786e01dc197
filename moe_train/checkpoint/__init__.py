"""Checkpoints by logical tensor: safetensors and a manifest, no pickle."""

from moe_train.checkpoint.load import CheckpointReader
from moe_train.checkpoint.manifest import Manifest, newest_complete, read_manifest, steps_in
from moe_train.checkpoint.piece import Piece
from moe_train.checkpoint.save import save_checkpoint

__all__ = ["CheckpointReader", "Manifest", "Piece", "newest_complete", "read_manifest", "save_checkpoint", "steps_in"]
