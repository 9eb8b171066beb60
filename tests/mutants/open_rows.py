"""What may go wrong where pass 2 of some rows of a batch has keys and values of its own."""

from .mutant import Mutant

ROWS = "features/test_open_rows_with_cache.py -k "

OF_OPEN_ROWS_WITH_A_CACHE = [
    Mutant(
        "open rows: only those with feedback now",
        "is_open.nonzero().flatten() if open_rows is None else open_rows.joined_by(is_open)",
        "is_open.nonzero().flatten()",
        f"{ROWS}'each_step and Llama'",
    ),
    Mutant(
        "open rows: one that opens later gets other keys and values",
        "[_selected(layer, rows) for layer in self.with_closed_rows(first_pass)]",
        "[_selected(layer, rows.flip(0)) for layer in self.with_closed_rows(first_pass)]",
        f"{ROWS}'as_without and Llama and greedy and full'",
    ),
    Mutant(
        "open rows: those that are open lose theirs when another opens",
        "layers = self.layers or [None] * len(first_pass)",
        "layers = [None] * len(first_pass)",
        f"{ROWS}'as_without and Llama and greedy and full'",
    ),
    Mutant(
        "open rows: beams go on with the rows of others",
        "self.rows, positions = is_there.nonzero().unbind(1)",
        "self.rows, positions = is_there.nonzero().unbind(1)[0], is_there.nonzero().unbind(1)[1].flip(0)",
        f"{ROWS}'whatever and Llama and full'",
    ),
    Mutant(
        "open rows: layers that no row has are kept",
        "if not is_there.any():",
        "if False:",
        f"{ROWS}all_be_closed",
    ),
    Mutant(
        "open rows: selected of none",
        "if self.layers:\n            self._choose",
        "if True:\n            self._choose",
        f"{ROWS}all_be_closed",
    ),
    Mutant(
        "open rows: not cropped",
        "for layer in self.layers:\n            layer.crop(tokens_to_remove)",
        "pass",
        f"{ROWS}'whatever and Llama and full'",
    ),
    Mutant(
        "open rows: forgotten where all rows have to run",
        "upper, passes.open_rows = passes.open_rows.with_closed_rows(upper), None",
        "passes.open_rows = None",
        f"{ROWS}'cut_into_rows or last_row'",
    ),
    Mutant(
        "open rows: where that is more work",
        "return saved > more and",
        "return",
        f"{ROWS}not_more",
    ),
    Mutant(
        "open rows: of layers that hold more than keys and values",
        "and all(type(layer) in plain for layer in layers)",
        "",
        f"{ROWS}taken_apart",
    ),
    Mutant(
        "open rows: positions with axes",
        'return 1 if name == "position_ids" and isinstance(value, torch.Tensor) and value.dim() == 3 else 0',
        "return 0",
        "features/test_closed_rows.py -k axes",
    ),
]
