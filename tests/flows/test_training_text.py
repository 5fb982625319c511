from gristmill.flows.training_text import end_text, plan_text, step_text, unmeasured_text

PLAN = {
    "rows": 1200, "units": 1200, "tokens": 50_000, "unshared_tokens": 80_000, "target_tokens": 20_000, "packs": 49,
    "fill": 0.9964, "steps": 98, "epochs": 2, "excluded": {"equal_answers": 1, "too_long": 4}, "truncated": 2,
    "excluded_rows": {"equal_answers": ["e1"], "too_long": ["a", "b", "c", "d"], "truncated": ["t1", "t2"]},
    "memory": {"weights": 2_500_000_000, "optimizer": 0, "buffer": 12_000, "total": 2_500_012_000},
    "loading": {"host": 900_000_000, "device": 2_600_000_000},
    "roofline": {"tokens_per_s": 20_571.4, "gflop_per_token": 34.0, "peak_tflops": 700.0, "peak": "a card"},
    "seconds": 200.0, "warnings": ["vLLM is not known to serve X"],
}  # fmt: skip


def test_the_plan_names_what_is_trained_left_out_and_needed() -> None:
    assert plan_text(PLAN).split("\n") == [
        "plan      1,200 rows, 50,000 tokens (20,000 of them targets) in 49 packs, 99.6 % full; 98 steps, 2 epochs",
        "shared    30,000 tokens that answers have in common lie once",
        "left out  equal_answers 1 (e1), too_long 4 (a, b, c, …)",
        "cut       2 rows lose their prompt's head (t1, t2)",
        "loading   about 900 MB on the host and 2.6 GB on the GPU",
        "memory    about 2.5 GB (weights 2.5 GB, buffer 12 kB)",
        "roofline  at most 20,571 tokens/s: 34 GFLOP a token at 700 TFLOP/s (a card); at least 3 min 20 s in all",
        "! vLLM is not known to serve X",
    ]
    whole = PLAN | {"excluded": {}, "truncated": 0, "unshared_tokens": 50_000, "warnings": []}
    assert plan_text(whole).split("\n")[1] == "left out  no row" and len(plan_text(whole).split("\n")) == 5
    held_out = whole | {"held_out": {"rows": 12, "excluded": {"equal_answers": 1, "too_long": 1300}}}
    assert plan_text(held_out).split("\n")[2] == "held out  12 rows measured, not: equal_answers 1, too_long 1,300"
    short = plan_text(whole | {"not_reached": 1100}).split("\n")
    assert short[1] == "in no step 1,100 rows: the steps end before the first epoch does (max_steps, epochs)"
    every = whole | {"held_out": {"rows": 1000, "excluded": {}}}
    assert plan_text(every).split("\n")[2] == "held out  1,000 rows measured"


def test_what_an_evaluation_left_out_is_said_once_a_set() -> None:
    row = {"set": "pairs", "excluded": {"equal_answers": 1, "too_long": 14}}
    assert unmeasured_text([{"set": "chats"}, row, row, {"set": "sft", "excluded": {"too_long": 2}}]) == [
        "pairs, held-out rows not measured: equal_answers 1, too_long 14",
        "sft, held-out rows not measured: too_long 2",
    ]


def test_the_live_line_and_the_end_say_the_share_of_the_roofline() -> None:
    step = {
        "loss": 0.693147,
        "accuracy": 0.625,
        "tokens_per_s": 1234.5,
        "roofline_share": 0.7123,
        "memory": 81e9,
        "eta": 75,
    }
    assert step_text(step) == (
        "loss 0.6931  accuracy 62.5 %  1,234 tokens/s  71.2 % of the roofline  81 GB  1 min 15 s left"
    )
    labelled = step | {"held_out_loss": 0.25, "held_out_auc": 0.875}
    assert "held out 0.2500  AUC 0.8750  1,234 tokens/s" in step_text(labelled)
    run = {
        "plan": PLAN, "loss": 0.5, "tokens_per_s": 900.0, "roofline_share": 0.05, "roofline_formula": "share = a / b",
        "best": {"loss": 0.4, "step": 50},
    }  # fmt: skip
    assert end_text(run, "out/dpo").split("\n") == [
        "98 steps, loss 0.5000, 900 tokens/s, 5 % of the roofline -> out/dpo",
        "    best on held-out rows: loss 0.4000 after step 50, in best/",
        "    share = a / b",
    ]
    assert "held" not in end_text(run | {"best": None}, "x")
