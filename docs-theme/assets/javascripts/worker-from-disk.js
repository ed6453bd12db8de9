// On a page that was opened from the disk a browser starts no Worker: the search's runs in a hidden frame there.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const scope = this.frame.contentWindow
      // Copies, as a Worker gets: either side changes what it was handed.
      scope.postMessage = data => this.answer(structuredClone(data))
      const script = scope.document.createElement("script")
      script.src = new URL(url, location)
      this.loaded = new Promise((resolve, reject) => Object.assign(script, { onload: resolve, onerror: reject }))
      this.loaded.catch(error => this.onerror?.(error))
      scope.document.head.append(script)
    }
    answer(data) {
      setTimeout(() => this.onmessage?.({ data }))
    }
    postMessage(message) {
      const data = structuredClone(message)
      this.loaded.then(() => this.frame.contentWindow?.onmessage({ data }), () => {})
    }
    terminate() {
      this.frame.remove()
    }
  }
}
