"""The bundled checkpoints, their data, recipes and packed models: what ``bidm demo`` writes out."""
