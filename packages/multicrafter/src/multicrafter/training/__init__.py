"""Training: both stages, the loop around them, checkpoints, several processes, precision, trackers, encoded scenes, previews."""
