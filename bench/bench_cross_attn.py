OPS = ("jagged_cross_attn", "cached_cross_attn")


def bench_cross_attn(compare, case):
    compare(case)
