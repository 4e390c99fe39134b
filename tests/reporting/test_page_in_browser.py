"""What the page's script does, in Chromium where there is one."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from mambahome_jax.evaluation.results import Evaluation, Score
from mambahome_jax.reporting.page import Report, render_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>document.title='broken'</script>"
# Clicks as the keyboard does on a button, and writes down what the table then shows.
STEPS = """
const head = (n) => document.querySelectorAll("#cases thead th")[n];
const column = (n) => Array.from(document.querySelectorAll("#cases tbody tr"), (row) => row.cells[n].textContent);
const found = { start: [column(0), column(1)] };
head(2).firstElementChild.click();
found.up = [column(2), head(1).getAttribute("aria-sort"), head(2).getAttribute("aria-sort")];
head(2).firstElementChild.click();
found.down = [column(2), head(2).getAttribute("aria-sort"), document.getElementById("status").textContent];
document.getElementById("metric").value = "hd95";
document.getElementById("metric").dispatchEvent(new Event("change"));
found.hd95 = [column(0), column(2)];
head(0).firstElementChild.click();
found.names = column(0);
found.title = document.title;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(found);
document.body.append(result);
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_sorting_and_choice_of_metric(tmp_path):
    values = {"case 10": (0.5, 4.0), "case 9": (0.25, 1.0), EVIL: (0.75, float("nan")), "none": (float("nan"), 2.0)}
    scores = [Score(case, 1, "liver", dice, hd95, 1.0, 1.0, 1.0, 1.0) for case, (dice, hd95) in values.items()]
    page = render_report(Report(Evaluation(scores, {})))
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"<script>{STEPS}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [BROWSER, *flags, file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found == {
        "start": [["case 9", "case 10", EVIL, "none"], ["0.250", "0.500", "0.750", "–"]],
        "up": [["0.250", "0.500", "0.750", "–"], "none", "ascending"],
        "down": [["0.750", "0.500", "0.250", "–"], "descending", "Sorted by liver, descending"],
        # The best came first, and does of distances too.
        "hd95": [["case 9", "none", "case 10", EVIL], ["1.00", "2.00", "4.00", "–"]],
        "names": [EVIL, "case 9", "case 10", "none"],
        "title": "Evaluation of 4 cases",
    }
