OPS = ("qla", "qla_state")


def bench_qla(compare, case):
    compare(case)
