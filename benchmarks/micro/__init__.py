"""Every operator on every backend against eager PyTorch and torch.compile, with pytest-benchmark.

    make bench-micro                               # everything, on the GPU if there is one
    python -m benchmarks.micro --device cpu -k pgd # a part
    python -m benchmarks.micro.table FILE          # a table of the rows, in Markdown

One setup serves the check and the timing: a contender whose results differ from the reference's fails and is not timed.
To add an operator, add its entry to `entries.py`.
"""
