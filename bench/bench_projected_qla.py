OPS = ("projected_qla",)


def bench_projected_qla(compare, case):
    compare(case)
