OPS = ("training_step", "layer", "summarize", "score")


def bench_model(compare, case):
    compare(case)
