"""Hugging Face folders: weights out of checkpoints (`hub.export`), and into runs (`model.weights`)."""

from moe_train.hub.layout import FolderLayout
from moe_train.hub.reader import HubReader, check_folder

__all__ = ["FolderLayout", "HubReader", "check_folder"]
