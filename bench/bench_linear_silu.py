OPS = ("linear_silu",)


def bench_linear_silu(compare, case):
    compare(case)
