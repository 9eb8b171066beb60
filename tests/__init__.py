"""The tests.

- `zoo.py`: a tiny model of every supported type, one row each
- `helpers.py`: adapters whose effect is visible, and comparisons
- `contract/`: what holds for every row of the zoo
- `families/`: what is special to ConvNets, hierarchies, fused projections, shared blocks, models that cannot work
- `golden/`: numbers recorded from the official code, and the formulas a second time
- `features/`: caches, checkpointing, compiling, saving, training and all else that does not depend on the model type
- `mutation.py`: breaks the package in a hundred ways, one at a time, and tells which test notices
"""
