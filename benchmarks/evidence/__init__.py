"""What the first hour on a GPU has to show, as stages that each leave their results on disk: docs/evidence.md."""
