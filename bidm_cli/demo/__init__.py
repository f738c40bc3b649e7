"""The bundled real checkpoint, its data and a recipe for it: what ``bidm demo`` writes out."""
