"""Made of finished runs: the HTML report, pictures, tables beside the paper's, docs/results.md."""
