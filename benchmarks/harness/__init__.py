"""How the benchmarks measure: command lines, results, isolated processes, interleaved trials, the page cache."""
