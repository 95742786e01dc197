"""What a run tells about itself: load figures, metrics.jsonl and wandb, the live line, load.png, tokens/s.

Observers only: nothing here changes a weight or issues a collective; counts arrive already reduced.
"""
