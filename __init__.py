"""ConsisLoRA for ComfyUI: style transfer with two small LoRAs on SDXL.

The body imports nothing: pytest imports this file too, outside of any ComfyUI.
"""

WEB_DIRECTORY = "./web"  # its docs/ is the nodes' help


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    import logging

    from comfy_api.latest import ComfyExtension

    from .host import demo_pictures, provenance
    from .nodes import NODES
    from .review import routes

    provenance.listen()
    routes.add_routes()
    demo_pictures.add_route()
    logging.info("ConsisLoRA: %d nodes", len(NODES))

    class ConsisLoRA(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return ConsisLoRA()
