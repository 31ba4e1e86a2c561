"""A workflow of the demo finds its pictures, and the user's own are left alone."""

from demo.run import IMAGES


def test_only_pictures_of_the_demo_that_are_missing_are_copied(pack, tmp_path):
    (tmp_path / "owl-flat.png").write_bytes(b"the user's")
    named = ["crown-turning.mp4", "owl-flat.png", "a photo.png", "../images/taxi-flat.png", "ATTRIBUTION.md", None]
    assert pack.host.demo_pictures.copy_missing(named, tmp_path) == ["crown-turning.mp4"]
    assert {path.name for path in tmp_path.iterdir()} == {"crown-turning.mp4", "owl-flat.png"}
    assert (tmp_path / "crown-turning.mp4").read_bytes() == (IMAGES / "crown-turning.mp4").read_bytes()
    assert (tmp_path / "owl-flat.png").read_bytes() == b"the user's"


def test_a_server_that_may_not_write_them_says_why_in_its_log_alone(server):
    folder = server.base / "input"
    moved = folder.rename(folder.with_name("gone"))
    folder.write_bytes(b"")
    try:
        assert server.post("/consislora/demo_pictures", ["crown-flat.png"]) == []
        assert "the demo's pictures are not in" in server.log
    finally:
        folder.unlink()
        moved.rename(folder)
