package android.content.res;

import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;

/** Assets are files of a folder. */
public final class AssetManager {
  private final String folder;

  public AssetManager(String folder) {
    this.folder = folder;
  }

  public InputStream open(String fileName) throws IOException {
    return new FileInputStream(folder + "/" + fileName);
  }
}
