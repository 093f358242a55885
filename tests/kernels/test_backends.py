"""Which backend runs, and that Triton stays out of the way until it does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tokenprune.kernels import transition_scores
from tokenprune.kernels.ops.backend import choose_backend

MODULES = sorted(
    path.stem for path in (Path(__file__).parents[2] / "kernels" / "triton").glob("*.py")
)


def _run(script, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, check=False
    )


def test_the_device_chooses_when_the_caller_does_not():
    assert choose_backend(None, torch.device("cuda", 1)) == "triton"
    assert choose_backend(None, torch.device("cpu")) == "torch"
    assert choose_backend("torch", torch.device("cuda")) == "torch"


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, visual = torch.ones(3, 4), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"on a CUDA device .*, got cpu; .*INTERPRET"):
        transition_scores(x, x, visual, backend="triton")


def test_the_torch_forms_work_without_triton():
    done = _run("""
        import sys
        sys.modules["triton"] = None
        import torch
        from tokenprune.kernels import instruction_attention, transition_scores
        x, visual = torch.ones(3, 4), torch.tensor([True, True, False])
        assert transition_scores(x, x, visual).tolist() == [0.5, 0.5]
        rows = torch.tensor([2])
        assert instruction_attention(x[None, :1], x[None], rows, visual, scale=1).shape == (2,)
        try:
            transition_scores(x, x, visual, backend="triton")
        except ValueError as error:
            assert "use backend='torch'" in str(error)
        else:
            raise AssertionError("triton ran")
    """)
    assert done.returncode == 0, done.stderr


def test_a_late_switch_is_refused_with_the_way_out():
    done = _run("""
        import os, torch, triton
        os.environ["TRITON_INTERPRET"] = "1"
        from tokenprune.kernels import transition_scores
        x, visual = torch.ones(3, 4), torch.ones(3, dtype=torch.bool)
        transition_scores(x, x, visual, backend="triton")
    """)
    assert "ValueError: tensors must be on a CUDA device" in done.stderr


@pytest.mark.parametrize("integers", ["i32", "one"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path, integers):
    # the interpreter accepts more than the compiler does; an argument of one is a constant to it
    done = _run(
        f"""
        import importlib
        from triton import JITFunction, compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        bf16 = ("x_ptr", "x_in_ptr", "x_out_ptr", "q_ptr", "k_ptr", "z_ptr", "cache_ptr")
        bf16 += ("features_ptr", "out_ptr")
        types = dict.fromkeys(bf16, "*bf16") | {{
            "visual_ptr": "*i1", "rows_ptr": "*i64", "q_rows_ptr": "*i64",
            "visual_keys_ptr": "*i64", "scale": "fp32", "scale_log2": "fp32",
            "kept_ptr": "*i64", "source_ptr": "*i64", "blocks_ptr": "*i32", "places_ptr": "*i16",
            "members_ptr": "*i64", "begin_ptr": "*i64", "grey_ptr": "*u8",
        }}
        constants = {{
            "SIGNED": False, "ALL_ROWS": False, "BLOCK": 256, "BLOCK_D": 1024, "WIDEN": False,
            "BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_DH": 64, "SPLITS": 4, "RUN": 1024,
            "ACCUMULATE": True, "CONSTANT": 1e-6, "MAX_NORMALISED": 1e15, "BLOCK_L": 8,
            "BLOCK_J": 16, "BLOCK_W": 64, "BLOCK_P": 256, "BLOCK_T": 32, "BLOCK_G": 16,
            "BLOCK_S": 4, "FIELDS": 5,
        }}
        small = {{"packed_decode_attention": {{"BLOCK_D": 64}}}}
        others = {{
            "packed_decode_attention": {{"rows_ptr": "*i32"}},
            "patch_entropy": {{"out_ptr": "*fp32"}},
            "recycle": {{"out_ptr": "*fp32"}},
        }}
        for module in {MODULES}:
            mine = types | others.get(module, {{}})
            known = constants | small.get(module, {{}})
            found = importlib.import_module(f"tokenprune.kernels.ops.triton.{{module}}")
            for name, kernel in vars(found).items():
                if not isinstance(kernel, JITFunction) or name.startswith("_"):
                    continue
                used = {{x: known[x] for x in kernel.arg_names if x in known}}
                signature = {{
                    x: "*fp32" if x.endswith("_ptr") else "i32" for x in kernel.arg_names
                }}
                signature |= {{x: mine[x] for x in kernel.arg_names if x in mine}}
                if {integers!r} == "one":
                    used |= {{x: 1 for x in signature if signature[x] == "i32" and x not in used}}
                signature |= dict.fromkeys(used, "constexpr")
                source = ASTSource(kernel, signature, used)
                assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
                print(name)
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 13
