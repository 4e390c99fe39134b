from mambahome_jax.reporting.report import run_rows, without_folders


def test_what_a_run_was():
    run = {
        "command": "infer",
        "configuration": {"data_path": "/home/jan kowalski/scans", "model_path": "C:\\models\\best", "spacing": None},
        "settings": {"roi_size": [48, 48, 48], "overlap": 0.5, "modality": "ct"},
        "versions": {"jax": "0.10.2"},
        "device": "1 x cpu (cpu)",
        "cases": [{"id": "a", "path": "/home/jan"}],
        "secret": "/home/jan",
    }
    assert run_rows(run) == [
        ("command", "infer"),
        ("device", "1 x cpu (cpu)"),
        ("configuration: data_path", "scans"),
        ("configuration: model_path", "best"),
        ("settings: roi_size", "48 48 48"),
        ("settings: overlap", "0.5"),
        ("settings: modality", "ct"),
        ("versions: jax", "0.10.2"),
        ("cases", "1"),
    ]
    assert run_rows({}) == run_rows({"configuration": 3}) == []


def test_messages_keep_the_last_name_of_a_path():
    text = "a: /home/jan kowalski/out/labels/a.nii.gz: truncated; no prediction in /home/jan kowalski/PRED"
    folders = ["/home/jan kowalski/out/labels", "/home/jan kowalski/PRED"]
    assert without_folders(text, folders) == "a: a.nii.gz: truncated; no prediction in PRED"
    assert without_folders("read /data/x/y.nii.gz, then D:\\scans\\z.nii.") == "read y.nii.gz, then z.nii."
    assert without_folders("3 of 4 mm/s, and/or 2TP / (P + R)") == "3 of 4 mm/s, and/or 2TP / (P + R)"
