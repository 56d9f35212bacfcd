"""Draws, trains, measures and exports the small vision-language model that ships with visq."""
