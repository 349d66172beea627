"""What the server of `multicrafter_workers` does before it forks its first child."""

from multicrafter_workers import warm

warm()
