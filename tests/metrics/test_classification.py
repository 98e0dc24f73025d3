"""scores: what the metrics' library is imported with; the metrics themselves are tested in test_train_utils.py."""
import subprocess
import sys


def test_the_metrics_are_imported_without_pandas_which_stays_importable():
    code = """if True:
        import sys
        from metrics.classification import metrics
        assert metrics().matthews_corrcoef([0, 1, 1], [0, 1, 1]) == 1
        assert not {"pandas", "pyarrow"} & sys.modules.keys()
        import pandas  # as datasets does
        assert metrics() is sys.modules["sklearn.metrics"] and sys.modules["pandas"] is pandas"""
    subprocess.run([sys.executable, "-c", code], check=True)
