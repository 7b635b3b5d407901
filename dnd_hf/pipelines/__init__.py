"""Labels in, images out; and the code and the cards that travel with a saved pipeline."""
