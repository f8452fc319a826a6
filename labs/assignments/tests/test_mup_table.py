"""Assignment 1. The numbers of the paper's models, laws of scaling, and model.py's table."""
from labs.assignments.tests.expect import near_ratio
from model import MiniCPMConfig
from model import mup_table as reference

PARTS = ("init std", "learning rate", "multiplier")


def compare(table, role, expected, model, hint=""):
    __tracebackhide__ = True
    assert role in table, f"{model}: no row {role!r}; expected embedding, matrix, head and norm"
    for part, got, value in zip(PARTS, table[role], expected):
        near_ratio(got, value, f"{model}, {part} of {role}", hint=hint)


def test_minicpm_2b(student):
    """Width 2304, 40 layers: m = 9."""
    table = student.mup_table(2304, 40)
    compare(table, "embedding", (0.1, 0.01, 12), "2.4B", "Adam's rate and the std do not scale")
    compare(table, "matrix", (0.1 / 3, 0.01 / 9, 1.4 / 40 ** 0.5), "2.4B", "m = 9: 0.0333, "
            "0.00111, 1.4 / sqrt(40 layers) = 0.221")
    compare(table, "head", (0.1, 0.01, 1 / 9), "2.4B", "tied to the embedding; logits / 9")


def test_minicpm_1b(student):
    """Width 1536, 52 layers: m = 6."""
    table = student.mup_table(1536, 52)
    compare(table, "matrix", (0.1 / 6 ** 0.5, 0.01 / 6, 1.4 / 52 ** 0.5), "1.2B", "m = 6: 0.0408, "
            "0.00167, 1.4 / sqrt(52 layers) = 0.194")
    compare(table, "head", (0.1, 0.01, 1 / 6), "1.2B", "m = 6")
    compare(table, "norm", (0, 0.01, 1), "1.2B", "norms start at 1 and learn at the global rate")


def test_the_base_width_is_not_scaled(student):
    """m = 1: constants as they are. And a small model, m = 1/2, is scaled the other way."""
    table = student.mup_table(256, 4)
    compare(table, "matrix", (0.1, 0.01, 0.7), "width 256 = base", "m = 1, 1.4 / sqrt(4)")
    compare(table, "head", (0.1, 0.01, 1), "width 256 = base", "m = 1")
    compare(student.mup_table(128, 4), "matrix", (0.1 * 2 ** 0.5, 0.02, 0.7), "width 128",
            "m = 0.5")


def test_powers_of_the_width(student):
    """What the table is for: a sum over `width` inputs neither grows nor shrinks with the width.

    At the start the products add up at random: std^2 width is constant. An update of Adam changes
    all weights alike: rate x width is constant. So is the logits' multiplier x width.
    """
    narrow, wide = student.mup_table(256, 8), student.mup_table(4096, 8)
    for table, width in ((narrow, 256), (wide, 4096)):
        std, rate, _ = table["matrix"]
        near_ratio(std ** 2 * width, 0.1 ** 2 * 256, f"width {width}: std^2 x width of a matrix",
                   hint="random signs: the sum of `width` products grows with its root")
        near_ratio(rate * width, 0.01 * 256, f"width {width}: learning rate x width of a matrix",
                   hint="equal signs: the sum of `width` changes grows with the width")
        near_ratio(table["head"][2] * width, 256, f"width {width}: head's multiplier x width")
    near_ratio(student.mup_table(256, 32)["matrix"][2], narrow["matrix"][2] / 2,
               "multiplier of a branch, 4 times the layers", hint="1 / sqrt(layers): half")


def test_other_constants_give_the_table_of_model_py(student):
    for width, layers, base, std, emb, depth in ((96, 3, 64, 0.05, 7.0, 1.1),
                                                 (512, 12, 128, 0.2, 10.0, 2.0)):
        config = MiniCPMConfig(n_embd=width, n_layer=layers, n_head=4, dim_model_base=base,
                               init_std=std, scale_emb=emb, scale_depth=depth)
        table = student.mup_table(width, layers, base, std, 0.02, emb, depth)
        multipliers = {"embedding": config.embedding_scale, "matrix": config.residual_scale,
                       "head": 1 / config.width_mult, "norm": 1.0}
        for role, multiplier in multipliers.items():
            row = reference(config)[role]
            compare(table, role, (row.std, 0.02 * row.lr, multiplier),
                    f"width {width}, layers {layers}, base {base}, init_std {std}, lr 0.02")
