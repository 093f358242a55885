"""Another project's distribution called `tokenprune` is noticed and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune import cli, plugin
from tokenprune.engine import compat
from tokenprune.errors import InstallationError, VersionError
from tokenprune.installation import check_distributions, install_command

WAY_OUT = "pip uninstall tokenprune, then pip install --force-reinstall --no-deps . in a checkout"


def install(folder: Path, name: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_environment_without_it_passes(site: Path) -> None:
    install(site, "vllm-tokenprune")
    install(site, "tokenprune-extras")
    check_distributions()


def test_somebody_elses_distribution_is_named_with_the_way_out(site: Path) -> None:
    install(site, "tokenprune")
    with pytest.raises(InstallationError) as caught:
        check_distributions()
    message = str(caught.value)
    assert message.startswith("the package tokenprune must come from vllm-tokenprune alone")
    assert f"distribution tokenprune in {site}," in message
    assert WAY_OUT in message


def test_somebody_elses_distribution_may_have_entry_points(site: Path) -> None:
    install(site, "tokenprune", "[console_scripts]\ntokenprune = tokenprune.core:main\n")
    with pytest.raises(InstallationError):
        check_distributions()


def test_a_folder_without_metadata_is_noticed_too(site: Path) -> None:
    # what is left where an uninstallation was interrupted
    (site / "tokenprune-0.1.0.dist-info").mkdir()
    with pytest.raises(InstallationError):
        check_distributions()


def test_ours_under_its_former_name_passes(site: Path) -> None:
    install(site, "tokenprune", "[vllm.general_plugins]\ntokenprune = tokenprune.plugin:register\n")
    check_distributions()


def test_the_command_refuses_to_begin(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "tokenprune")
    monkeypatch.setattr("sys.argv", ["tokenprune", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("Error: the package tokenprune must come from vllm-tokenprune")
    assert WAY_OUT in output.err


def test_the_plugin_warns_and_goes_on(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        raise VersionError("far enough")

    install(site, "tokenprune")
    monkeypatch.setattr(compat, "check_version", stop)
    plugin.register()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "must come from vllm-tokenprune alone" in caplog.messages[0]
    assert caplog.messages[1].endswith("far enough")


def test_extras_are_installed_from_a_checkout() -> None:
    assert install_command("cuda") == 'pip install ".[cuda]" in a checkout of tokenprune'
