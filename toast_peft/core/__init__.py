"""What all families of models share: the formulas, the layers around them and the two passes."""
