OPS = ("qla",)


def bench_qla(compare, case):
    compare(case)
