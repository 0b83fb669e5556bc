OPS = ("sglu",)


def bench_sglu(compare, case):
    compare(case)
