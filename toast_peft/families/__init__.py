"""How each family of models is found, steered and run twice: transformers, ConvNets, hierarchical transformers."""
