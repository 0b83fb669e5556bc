OPS = ("cache_gather", "quantize_rows", "cache_scatter_")


def bench_cache_rows(compare, case):
    compare(case)
