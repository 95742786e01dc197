"""Text -> Megatron `.bin`/`.idx` -> packed, shuffled, blended samples. Arrays are numpy's; no torch in this room."""
