import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from adapt_pruner_jax.config import Config
from adapt_pruner_jax.errors import UserError
from adapt_pruner_jax.evaluation import evaluate
from adapt_pruner_jax.formats import convert
from adapt_pruner_jax.models import model_config
from adapt_pruner_jax.reporting.html import charts, report
from adapt_pruner_jax.runs import run as run_
from adapt_pruner_jax.runs import tiny_model
from adapt_pruner_jax.storage import json_files
from tests import small_runs

FULL = tiny_model.config_of(tiny_model.Recipe())
STAGES, STEPS = 3, 2  # of the run below
BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "google-chrome"))), None
)


def layers(number):
  """Layer i loses i channels a step, the odd ones a KV group in step 2."""
  return [
    {
      "kv_groups": FULL.kv_groups[i] - (i % 2 and number >= 2),
      "ffn": FULL.ffn_widths[i] - i * number,
      "importance": -0.9,
      "attn_importance": None,
      "mlp_importance": 1 - i / 2.5,
      "attn_sparsity": 0.0,
      "mlp_sparsity": 0.02 * number,
    }
    for i in range(FULL.num_layers)
  ]


def write_run(path, finished=True, name="tiny"):
  path.mkdir()
  config = Config()
  config.model.path = name
  config.prune.ratio, config.prune.stages = 0.25, STAGES
  json_files.write_json(path / "config.json", dataclasses.asdict(config))
  for number in range(1, STAGES * STEPS + 1):
    stage, step = (number - 1) // STEPS + 1, (number - 1) % STEPS + 1
    row = {"stage": stage, "step": step, "loss": 3.0 + number / 10}
    row |= {"params": 1_000_000 - number, "layers": layers(number)}
    json_files.append_line(path / "trace.jsonl", row)
  for step in range(30):
    row = {"kind": "train", "step": step, "stage": 1 + step // 10, "time": 0}
    row |= {"loss": float("nan") if step == 4 else 2.0, "learning_rate": 1e-5}
    row |= {"step_seconds": 0.25, "tokens_per_second_per_chip": 100.0 + step}
    json_files.append_line(path / "metrics.jsonl", row)
  row = {"kind": "phase", "title": "stage 1: <recovery>", "seconds": 90.0}
  row |= {"per_second": 1234.0, "unit": "tokens", "mfu": 0.421, "step": 0}
  row |= {"memory_peak": 12_340_000_000, "time": 0}
  json_files.append_line(path / "metrics.jsonl", row)
  for stage in range(1, STAGES + 1):
    row = {"kind": "eval", "step": stage, "stage": stage, "params": 1}
    row |= {"perplexity": 20.0 + stage, "time": 0}
    json_files.append_line(path / "metrics.jsonl", row)
  if finished:
    json_files.write_json(path / "summary.json", summary())
  return path


def summary():
  last = layers(STAGES * STEPS)
  groups = [x["kv_groups"] for x in last]
  return {
    "method": "adapt",
    "params_before": 1_200_000,
    "params_after": 900_000,
    "target_params": 900_000,
    "perplexity_before": 20.0,
    "perplexity_after": 23.0,
    "bits_per_byte_before": 1.25,
    "bits_per_byte_after": 1.5,
    "train_tokens": 30_000,
    "seconds": 3725.0,
    "heads_before": [k * FULL.queries_per_group for k in FULL.kv_groups],
    "heads_after": [k * FULL.queries_per_group for k in groups],
    "kv_heads_before": list(FULL.kv_groups),
    "kv_heads_after": groups,
    "ffn_before": list(FULL.ffn_widths),
    "ffn_after": [x["ffn"] for x in last],
    "versions": {"jax": "1.2.3"},
    "hardware": "1 x <abacus>",
    "tasks_before": {"$pi$": 0.5, "a & b": 0.4},
    "tasks_after": {"$pi$": 0.45, "a & b": 0.38},
  }


def svgs(text):
  """The charts of a page, {"removed-wide": element}; parsed strictly."""
  found = {}
  for source in re.findall(r"<svg .*?</svg>", text, flags=re.S):
    root = ElementTree.fromstring(source)
    ids = [e.get("id") or "" for e in root.iter()]
    name = next(i for i in ids if i.endswith("-figure_1"))
    found[name.removesuffix("-figure_1")] = root
  return found


def numbers(group):
  """Coordinates of the first path in a group, [[x, y], ...]."""
  data = next(e.get("d") for e in group.iter() if e.get("d"))
  pairs = re.findall(r"[ML] (\S+) (\S+)", data)
  return [[float(x), float(y)] for x, y in pairs]


def by_id(root, name):
  return next(e for e in root.iter() if e.get("id") == name)


def height(root, name):
  ys = [y for _, y in numbers(by_id(root, name))]
  return max(ys) - min(ys)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = write_run(tmp_path_factory.mktemp("report") / "it's a <run>")
  report.write(path)
  return path


@pytest.fixture(scope="module")
def text(run):
  return (run / "report.html").read_text()


def test_page_is_whole_and_self_contained(text):
  class Parser(html.parser.HTMLParser):
    tags: list

    def handle_starttag(self, tag, attrs):
      self.tags.append(tag)
      urls = [v for k, v in attrs if k in ("src", "href", "xlink:href")]
      assert all(url.startswith("#") for url in urls), urls

  parser = Parser()
  parser.tags = []
  parser.feed(text)
  assert not {"script", "link", "img", "iframe"} & set(parser.tags)
  assert "@import" not in text
  assert re.findall(r"url\((?!#)", text) == []
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids))
  used = re.findall(r'(?:url\(|href=")#([^")]+)', text)
  assert set(used) <= set(ids)


def test_bits_per_byte_are_in_the_table(text):
  cells = ("bits per byte", "1.25", "1.5", "+20.0%")
  assert "".join(f"<td>{cell}</td>" for cell in cells) in text


def test_speed_and_memory(text):
  assert "Speed and memory" in text
  assert "A train step took 0.25 s, 114.5 tokens a second and device" in text
  row = ("1 min 30 s", "1,234 tokens/s", "42.1%", "12.34 GB")
  cells = "".join(f"<td>{x}</td>" for x in row)
  assert f"<td>stage 1: &lt;recovery&gt;</td>{cells}" in text


def test_headline(text):
  assert (
    "25.0% of tiny was removed: 1,200,000 → 900,000 parameters, perplexity "
    "20 → 23, in 1 h 02 min."
  ) in text


def test_everything_is_escaped(text):
  assert "<run>" not in text
  assert "a &lt;run&gt;" in text
  assert "<abacus>" not in text
  assert "1 x &lt;abacus&gt;" in text
  # The charts have names as they are: no formulas, no markup.
  labels = {t.text for t in svgs(text)["scores-wide"].iter() if t.text}
  assert {"$pi$", "a & b"} <= labels


def test_bars_are_what_is_kept_and_what_went_when(text):
  for kind in "wide", "narrow":
    root = svgs(text)[f"removed-{kind}"]
    whole = height(root, f"removed-{kind}-ffn-kept-0") / FULL.ffn_widths[0]
    last = summary()["ffn_after"]
    for layer in range(FULL.num_layers):
      kept = height(root, f"removed-{kind}-ffn-kept-{layer}")
      assert kept / whole == pytest.approx(last[layer], rel=1e-3)
      for stage in range(1, STAGES + 1) if layer else ():
        went = height(root, f"removed-{kind}-ffn-stage{stage}-{layer}")
        assert went / whole == pytest.approx(layer * STEPS, rel=1e-2)
    # Heads went in the first stage, and only from odd layers.
    ids = [e.get("id") or "" for e in root.iter()]
    heads = [i for i in ids if f"{kind}-kv_groups-stage" in i]
    prefix = f"removed-{kind}-kv_groups-stage1-"
    assert heads == [prefix + str(layer) for layer in (1, 3, 5)]
    tip = by_id(root, f"removed-{kind}-kv_groups-kept-1")[0].text
    assert tip == "layer 1: 8 → 6"


def test_lines_have_the_data(text):
  found = svgs(text)
  path = by_id(found["sparsity-wide"], "sparsity-wide-path-ffn-5")
  assert (
    path[0].text == f"layer 5: {100 * 30 / FULL.ffn_widths[5]:.1f} % removed"
  )
  # Steps: the share that is gone grows equally at each.
  levels = sorted({y for _, y in numbers(path)})
  assert len(levels) == STAGES * STEPS + 1
  gaps = [b - a for a, b in itertools.pairwise(levels)]
  assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3)
  params = numbers(by_id(found["pruning-wide"], "pruning-wide-params"))
  assert len(params) == STAGES * STEPS + 1
  points = numbers(
    by_id(found["perplexity-wide"], "perplexity-wide-perplexity")
  )
  ys = [y for _, y in points]
  assert len(points) == STAGES + 1
  assert ys == sorted(ys, reverse=True)  # SVG counts from the top
  loss = numbers(by_id(found["training-wide"], "training-wide-loss"))
  assert len(loss) >= 2


def test_both_panels_show_all_of_the_paths():
  """Although heads, drawn first, lose nothing here."""
  trace = [
    {"stage": 1, "layers": [{"kv_groups": 4, "ffn": width}]}
    for width in (90, 80, 70, 60)
  ]
  chart = charts.sparsity({"kv_groups": [4], "ffn": [100]}, trace)
  name = "sparsity-wide"
  path = numbers(by_id(svgs(chart)[name], f"{name}-path-ffn-0"))
  levels = sorted({y for _, y in path}, reverse=True)
  gaps = [a - b for a, b in itertools.pairwise(levels)]
  assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-3)


def test_importance_cells(text):
  root = svgs(text)["importance-wide"]
  cells = [e for e in root.iter() if "-cell-" in (e.get("id") or "")]
  assert len(cells) == STAGES * FULL.num_layers
  colours = []
  for layer in 0, FULL.num_layers - 1:
    cell = by_id(root, f"importance-wide-cell-0-{layer}")
    style = next(e.get("style") for e in cell.iter() if e.get("style"))
    colours.append(re.search(r"fill: var\(--(\w+)\)", style)[1])
  assert colours == ["importance6", "importance0"]


def test_json_has_the_same_data(run):
  found = json_files.read_json(run / "report.json")
  assert found["finished"]
  assert found["before"] == {
    "kv_groups": list(FULL.kv_groups),
    "ffn": list(FULL.ffn_widths),
  }
  assert set(found["heads_per_kv_group"]) == {FULL.queries_per_group}
  assert found["after"]["ffn"] == summary()["ffn_after"]
  assert found["perplexity"] == [[0, 20.0], [1, 21.0], [2, 22.0], [3, 23.0]]
  assert len(found["trace"]) == STAGES * STEPS
  assert len(found["train"]) == 30


def test_a_run_in_progress(tmp_path):
  path = write_run(tmp_path / "run", finished=False)
  for name in "trace.jsonl", "metrics.jsonl":
    with open(path / name, "a") as file:
      file.write('{"stage": 3, "ste')  # being written, or cut off by a kill
  text = report.write(path, FULL).read_text()
  assert "in progress" in text
  assert "999,994 parameters are left, in stage 3 of 3" in text
  assert "adapt-pruner run --config" in text
  found = json_files.read_json(path / "report.json")
  assert found["params_before"] == model_config.count_params(FULL)
  assert found["target_params"] == int(model_config.count_params(FULL) * 0.75)
  names = {name.removesuffix("-wide") for name in svgs(text)}
  assert {"removed", "importance", "sparsity", "pruning", "training"} <= names


def test_a_run_that_has_just_begun(tmp_path):
  path = write_run(tmp_path / "run", finished=False)
  (path / "trace.jsonl").unlink()
  (path / "metrics.jsonl").unlink()
  text = report.write(path).read_text()
  assert "nothing has been removed yet" in text
  assert svgs(text) == {}


def test_the_original_is_gone(tmp_path):
  """What the layers had is then taken from the first step."""
  path = write_run(tmp_path / "run", finished=False, name="/nowhere/Llama<3>")
  text = report.write(path).read_text()
  assert "Llama&lt;3&gt; is being pruned" in text
  first = [x["ffn"] for x in layers(1)]
  assert json_files.read_json(path / "report.json")["before"]["ffn"] == first


def test_methods_without_importance(tmp_path):
  """Other methods have no importance, and NaN for a loss."""
  path = write_run(tmp_path / "run")
  rows = json_files.read_lines(path / "trace.jsonl")
  for row in rows:
    row["loss"] = float("nan")
    for layer in row["layers"]:
      layer |= {"attn_importance": None, "mlp_importance": None}
  json_files.rewrite_lines(path / "trace.jsonl", rows)
  found = svgs(report.write(path).read_text())
  assert "importance-wide" not in found
  assert "removed-wide" in found


def test_many_steps_are_thinned_out():
  rows = [
    {"stage": 1, "step": i, "layers": [{"attn_importance": -0.5,
                                        "mlp_importance": None}]}
    for i in range(1, 101)
  ]  # fmt: skip
  found, label = charts.importance_rows(rows)
  assert label == "step"
  assert (found[0][0], found[-1][0]) == (1, 100)
  assert len(found) == 12
  assert found[0][1] == [-0.5]


def test_a_model_is_no_run(small_model):
  with pytest.raises(UserError, match="not the work directory of a run"):
    report.write(small_model)


def test_bad_directories(tmp_path):
  with pytest.raises(UserError, match="is not the work directory of a run"):
    report.write(tmp_path)
  path = write_run(tmp_path / "run")
  lines = (path / "trace.jsonl").read_text().splitlines()
  lines[1] = lines[1][:50]
  (path / "trace.jsonl").write_text("\n".join(lines) + "\n")
  with pytest.raises(UserError, match=r"trace\.jsonl, line 2 is damaged"):
    report.write(path)
  assert not (path / "report.html").exists()


@pytest.mark.slow
def test_a_run_with_tasks_and_latency(
  small_model, tmp_path, monkeypatch, capsys
):
  """Killed while it exports, it need not ask again; the page shows both."""
  pytest.importorskip("lm_eval")
  folder, work = tmp_path / "questions", tmp_path / "work"
  number = small_runs.write_questions(folder)
  config = small_runs.recipe(small_model, stages=1, method="magnitude")
  config.eval.tasks, config.eval.tasks_dir = "arc_easy", str(folder)
  config.eval.text, config.eval.latency = "", True

  def killed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(convert, "write", killed)
    with pytest.raises(KeyboardInterrupt):
      run_.run(config, work)
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "import_harness", lambda: Checked)
    found = run_.run(config, work)
  for name, path in (("before", small_model), ("after", work / "model")):
    alone = evaluate.evaluate(path, ["arc_easy"], tasks_dir=str(folder))
    score = alone["tasks"]["arc_easy"]["acc_norm"]
    assert found[f"tasks_{name}"] == {"arc_easy": score}
    assert found["latency"][name]["decode_ms_per_token"] > 0
  assert found["evaluation_before"]["tasks"]["arc_easy"]["n"] == number
  said = capsys.readouterr().out
  rows = [line.split("  ")[0] for line in said.splitlines()]
  assert {"arc_easy", "prefill, ms", "decode, ms/token"} <= {*rows}
  text = (work / "report.html").read_text()
  assert "<td>arc_easy</td>" in text
  assert f"Speed: {html.escape(found['latency']['text'])}." in text
  assert f"<b>{found['latency']['decode_speedup']:.2f}×</b>" in text


class Checked:
  """A harness that knows the tasks but is not to ask them."""

  check = staticmethod(lambda *_: None)


PROBE = """<script>
const style = (e, p) => getComputedStyle(e).getPropertyValue(p);
const bar = document.querySelector('[id="removed-KIND-ffn-kept-2"] path');
document.title = JSON.stringify({
  wide: style(document.querySelector('#removed .wide'), 'display'),
  narrow: style(document.querySelector('#removed .narrow'), 'display'),
  page: style(document.body, 'background-color'),
  bar: style(bar, 'fill'),
  box: bar.getBoundingClientRect().height,
  overflow: document.documentElement.scrollWidth - window.innerWidth,
});
</script>"""


def probe(run, tmp_path, width, dark):
  """What a browser makes of the page: colours and sizes."""
  kind = "narrow" if width <= 620 else "wide"
  page = tmp_path / "probe.html"
  text = (run / "report.html").read_text()
  page.write_text(text + PROBE.replace("KIND", kind))
  command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
  command += [f"--user-data-dir={tmp_path / 'profile'}"]
  command += [f"--window-size={width},2000", "--dump-dom"]
  command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
  done = subprocess.run(
    [*command, page.as_uri()], capture_output=True, text=True, timeout=120
  )
  title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
  assert title, done.stderr[-2000:]
  return json.loads(html.unescape(title[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page with")
def test_in_a_browser(run, tmp_path):
  phone = probe(run, tmp_path, 500, dark=True)
  desk = probe(run, tmp_path, 1280, dark=False)
  assert (phone["narrow"], phone["wide"]) == ("block", "none")
  assert (desk["narrow"], desk["wide"]) == ("none", "block")
  assert phone["overflow"] <= 0
  assert desk["overflow"] <= 0
  assert phone["box"] > 50
  assert desk["box"] > 50
  assert phone["page"] == "rgb(16, 20, 24)"
  assert desk["page"] == "rgb(246, 247, 248)"
  assert phone["bar"] == "rgb(91, 159, 240)"
  assert desk["bar"] == "rgb(37, 99, 184)"
